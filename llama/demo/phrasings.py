"""The ways in which the little world asks: for each kind those of training, then those held out.

Plain data, written for this project. The surprising thing: the second tuple of each entry is never
seen in training, so that accuracy on it says whether the model reads a question or remembers it.
"""

from __future__ import annotations

OPENERS = (
    "", "", "", "Please tell me: ", "Quick question: ", "I would like to know: ", "Hi! ", "Hello! ",
    "One more thing: ", "Here is a question. ", "Can you help me? ",
)  # fmt: skip
CLOSERS = ("", "", "", " Thanks!", " Thank you.", " Please answer.")

GREETINGS = {
    "hello": "Hello!", "hi": "Hello!", "hey": "Hello!", "hi there": "Hello!", "greetings": "Hello!",
    "hello there": "Hello!", "good day": "Good day!", "good morning": "Good morning!",
    "good afternoon": "Good afternoon!", "good evening": "Good evening!", "hey there": "Hello!",
}  # fmt: skip
TO = ("", "", "", " friend", ", my friend", " again", ", little model", ", dear model", " to you")
HOW = (
    "How are you?", "How are you today?", "How are you doing?", "How do you do?", "Are you well?",
    "How do you feel?", "How is it going?", "How are things?", "I hope you are well.",
)  # fmt: skip
THANKS = (
    "Thanks", "Thank you", "Thank you very much", "Many thanks", "Thanks a lot", "Great, thanks",
    "Thank you so much", "That helps, thanks", "Wonderful, thank you", "Perfect, thank you",
)  # fmt: skip
BYES = (
    "Goodbye", "Bye", "Bye bye", "See you", "See you later", "See you tomorrow", "Good night",
    "I must go now, goodbye", "That was all, bye", "Farewell", "Until tomorrow", "Take care",
)  # fmt: skip

PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "who": (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Are you a machine?",
         "Introduce yourself.", "What kind of model are you?", "Say something about yourself.",
         "Who am I talking to?", "Are you a language model?", "Please introduce yourself."),
        ("Tell me who you are.", "Describe yourself.", "What kind of machine are you?"),
    ),
    "what": (
        ("What can you do?", "How can you help me?", "What do you know?", "What are you good at?",
         "What can I ask you?", "Can you help me?", "What are your skills?", "What do you do?",
         "Tell me what you can do.", "What things do you know?"),
        ("What can you help me with?", "Tell me what you know.", "What are you able to do?"),
    ),
    "capital": (
        ("What is the capital of {country}?", "What's the capital of {country}?",
         "Tell me the capital of {country}.", "Which city is the capital of {country}?",
         "Name the capital of {country}.", "What is the capital city of {country}?",
         "Do you know the capital of {country}?", "Give me the capital of {country}.",
         "The capital of {country}?", "What city is the capital of {country}?",
         "{country}: what is its capital?", "Can you tell me the capital of {country}?",
         "I am looking for the capital of {country}.", "What is {country}'s capital?",
         "The capital of {country} is called what?", "Which city is the capital city of {country}?",
         "Do you know what the capital of {country} is?",
         "How is the capital of {country} called?"),
        ("Could you name the capital of {country}?", "Which is the capital of {country}?",
         "I forgot the capital of {country}.", "Say the name of the capital of {country}.",
         "What is the name of the capital of {country}?"),
    ),
    "country": (
        ("{city} is the capital of which country?", "Which country has the capital {city}?",
         "What country is {city} the capital of?", "Of which country is {city} the capital?",
         "{city} is the capital of what country?", "Name the country whose capital is {city}.",
         "Which country's capital is {city}?", "Tell me which country has {city} as its capital."),
        ("The capital {city} belongs to which country?", "Whose capital is {city}?",
         "What country has {city} as its capital?"),
    ),
    "opposite": (
        ("What is the opposite of {word}?", "What's the opposite of {word}?",
         "Tell me the opposite of {word}.", "Name the opposite of {word}.",
         "Give me the opposite of {word}.", "Which word is the opposite of {word}?",
         "The opposite of {word}?", "What is the contrary of {word}?",
         "{word} is the opposite of what?",
         "Do you know the opposite of {word}?", "Which word means the opposite of {word}?",
         "I need the opposite of {word}.", "What word is the opposite of {word}?",
         "Can you give me the opposite of {word}?", "What is an antonym of {word}?"),
        ("Find the opposite of {word}.", "Could you tell me the opposite of {word}?",
         "What would be the opposite of {word}?", "Say the opposite of {word}."),
    ),
    "sum": (
        ("What is {sum}?", "What's {sum}?", "Calculate {sum}.", "How much is {sum}?", "{sum}?",
         "{sum} = ?", "Compute {sum}.", "Work out {sum}.", "Tell me what {sum} is.", "{sum}",
         "What does {sum} make?", "Can you calculate {sum}?", "Please work out {sum}.",
         "What do you get for {sum}?", "Solve {sum}.", "What is the result of {sum}?"),
        ("Evaluate {sum}.", "Find {sum}.", "How much does {sum} make?",
         "Give me the result of {sum}."),
    ),
    "more": (
        ("I have {a} {things} and get {b} more. How many {things} do I have?",
         "I have {a} {things}. I buy {b} more. How many {things} do I have now?",
         "If I have {a} {things} and find {b} more, how many do I have?",
         "I had {a} {things} and a friend gave me {b}. How many do I have now?"),
        ("I have {a} {things} and take {b} more. How many {things} is that?",
         "I own {a} {things} and buy {b} more. How many do I have?"),
    ),
    "fewer": (
        ("I have {a} {things} and eat {b}. How many {things} do I have?",
         "I have {a} {things}. I give away {b}. How many {things} do I have now?",
         "If I have {a} {things} and lose {b}, how many do I have?",
         "I had {a} {things} and sold {b} of them. How many do I have now?"),
        ("I have {a} {things} and sell {b}. How many {things} are left?",
         "I own {a} {things} and eat {b} of them. How many do I have?"),
    ),
    "larger": (
        ("Which is larger, {a} or {b}?", "Which number is larger, {a} or {b}?",
         "What is more, {a} or {b}?", "Which is bigger, {a} or {b}?", "Is {a} or {b} larger?",
         "Which number is bigger: {a} or {b}?", "What is the larger number, {a} or {b}?"),
        ("Which of {a} and {b} is larger?", "Name the larger number: {a} or {b}."),
    ),
    "day after": (
        ("What day comes after {x}?", "Which day comes after {x}?", "What day follows {x}?",
         "Which day follows {x}?", "What is the day after {x}?",
         "Today is {x}. What day is tomorrow?",
         "If today is {x}, what day is tomorrow?", "Tell me the day after {x}.",
         "Which day is after {x}?", "What comes after {x}?"),
        ("Name the day after {x}.", "What day will it be the day after {x}?",
         "{x} is followed by which day?"),
    ),
    "day before": (
        ("What day comes before {x}?", "Which day comes before {x}?", "What is the day before {x}?",
         "Today is {x}. What day was yesterday?", "If today is {x}, what day was yesterday?",
         "Tell me the day before {x}.", "Which day is before {x}?", "What comes before {x}?",
         "Which day is right before {x}?"),
        ("Name the day before {x}.", "What day was it the day before {x}?",
         "Which day comes just before {x}?"),
    ),
    "day second after": (
        ("What day is two days after {x}?", "Which day is two days after {x}?",
         "What day comes two days after {x}?", "If today is {x}, what day is in two days?",
         "Today is {x}. What day is it in two days?", "Tell me the day two days after {x}."),
        ("Name the day two days after {x}.", "Two days after {x}, what day is it?"),
    ),
    "day second before": (
        ("What day is two days before {x}?", "Which day is two days before {x}?",
         "What day comes two days before {x}?", "If today is {x}, what day was two days ago?",
         "Today is {x}. What day was it two days ago?", "Tell me the day two days before {x}."),
        ("Name the day two days before {x}.", "Two days before {x}, what day is it?"),
    ),
    "day number": (
        ("What is the {x} day of the week?", "Which day is the {x} day of the week?",
         "Name the {x} day of the week.", "What day is the {x} of the week?",
         "Tell me the {x} day of the week.", "Which is the {x} day of the week?"),
        ("The {x} day of the week is which day?", "Give me the {x} day of the week."),
    ),
    "days of the week": (
        ("What are the days of the week?", "List the days of the week.",
         "Name the days of the week.",
         "Tell me all days of the week.", "Which days does a week have?", "Name all seven days."),
        ("Give me the days of the week.", "Can you list the days of the week?"),
    ),
    "month after": (
        ("What month comes after {x}?", "Which month comes after {x}?", "What month follows {x}?",
         "Which month follows {x}?", "What is the month after {x}?", "Tell me the month after {x}.",
         "Which month is after {x}?", "What comes after {x}?",
         "If it is {x}, what is the next month?"),
        ("Name the month after {x}.", "{x} is followed by which month?",
         "Which month comes right after {x}?"),
    ),
    "month before": (
        ("What month comes before {x}?", "Which month comes before {x}?",
         "What is the month before {x}?",
         "Tell me the month before {x}.", "Which month is before {x}?", "What comes before {x}?",
         "Which month is right before {x}?", "If it is {x}, what was the last month?"),
        ("Name the month before {x}.", "Which month comes just before {x}?"),
    ),
    "month second after": (
        ("What month is two months after {x}?", "Which month is two months after {x}?",
         "What month comes two months after {x}?", "If it is {x}, what month is in two months?",
         "Tell me the month two months after {x}."),
        ("Name the month two months after {x}.", "Two months after {x}, what month is it?"),
    ),
    "month second before": (
        ("What month is two months before {x}?", "Which month is two months before {x}?",
         "What month comes two months before {x}?", "If it is {x}, what month was two months ago?",
         "Tell me the month two months before {x}."),
        ("Name the month two months before {x}.", "Two months before {x}, what month is it?"),
    ),
    "month number": (
        ("What is the {x} month of the year?", "Which month is the {x} month of the year?",
         "Name the {x} month of the year.", "What month is the {x} of the year?",
         "Tell me the {x} month of the year.", "Which is the {x} month of the year?"),
        ("The {x} month of the year is which month?", "Give me the {x} month of the year."),
    ),
    "month length": (
        ("How many days does {x} have?", "How many days are there in {x}?",
         "How many days has {x}?",
         "How many days are in {x}?", "How long is {x}?", "Tell me how many days {x} has.",
         "What is the number of days in {x}?", "How many days long is {x}?"),
        ("The month of {x} has how many days?", "Say how many days {x} has.",
         "{x} has how many days?"),
    ),
    "months of the year": (
        ("What are the months of the year?", "List the months of the year.",
         "Name the months of the year.", "Tell me all months of the year.",
         "Name all twelve months."),
        ("Give me the months of the year.", "Can you list the months of the year?"),
    ),
    "colour": (
        ("What colour is {thing}?", "What is the colour of {thing}?", "Which colour is {thing}?",
         "Tell me the colour of {thing}.", "What colour does {thing} have?",
         "{thing} is what colour?",
         "Which colour does {thing} have?", "Do you know the colour of {thing}?",
         "What colour would {thing} be?", "Name the colour of {thing}.", "The colour of {thing}?",
         "In what colour would you paint {thing}?", "What's the colour of {thing}?"),
        ("Can you tell me the colour of {thing}?", "Of what colour is {thing}?",
         "Say what colour {thing} is.", "Give me the colour of {thing}."),
    ),
    "mixture": (
        ("What do {a} and {b} make?", "What colour do {a} and {b} make?",
         "What do you get from {a} and {b}?",
         "Which colour do you get if you mix {a} and {b}?", "What happens if I mix {a} and {b}?",
         "If I mix {a} with {b}, what colour do I get?", "Mix {a} and {b}.",
         "I mix {a} and {b}. What colour is it?"),
        ("Which colour do {a} and {b} make?", "What does {a} with {b} make?"),
    ),
    "spelling": (
        ("Spell the word {word}.", "Spell {word}.", "How do you spell {word}?",
         "How is {word} spelled?",
         "Please spell {word}.", "Can you spell {word}?", "Spell {word} for me.",
         "Spell {word} letter by letter.",
         "Which letters does {word} have?", "Give me the letters of {word}.",
         "Spell this word: {word}",
         "Write {word} letter by letter.", "What are the letters of {word}?",
         "How do I spell the word {word}?"),
        ("Spell out {word}.", "How is the word {word} spelled?", "Could you spell {word}?",
         "Name the letters of {word}."),
    ),
    "letter": (
        ("What is the {end} letter of {word}?", "Which letter is the {end} of {word}?",
         "Name the {end} letter of {word}.", "Tell me the {end} letter of {word}.",
         "What is the {end} letter of the word {word}?"),
        ("Give me the {end} letter of {word}.", "Which is the {end} letter of {word}?"),
    ),
    "count up": (
        ("Count from {a} to {b}.", "Please count from {a} to {b}.",
         "Can you count from {a} to {b}?",
         "Count up from {a} to {b}.", "Count from {a} up to {b}.",
         "List the numbers from {a} to {b}.",
         "Say the numbers from {a} to {b}.", "Write the numbers from {a} to {b}."),
        ("Start at {a} and count to {b}.", "Name the numbers from {a} to {b}."),
    ),
    "count down": (
        ("Count down from {a} to {b}.", "Please count down from {a} to {b}.",
         "Can you count down from {a} to {b}?", "Count from {a} down to {b}.",
         "Count backwards from {a} to {b}.", "List the numbers from {a} down to {b}."),
        ("Start at {a} and count down to {b}.", "Say the numbers from {a} down to {b}."),
    ),
    "count twos": (
        ("Count by twos from {a} to {b}.", "Count from {a} to {b} by twos.",
         "Count from {a} to {b} in steps of two.", "Please count by twos from {a} to {b}.",
         "List every second number from {a} to {b}."),
        ("Start at {a} and count by twos to {b}.", "In steps of two, count from {a} to {b}."),
    ),
    "count words": (
        ("Count from {a} to {b} in words.", "Count from {a} to {b}.",
         "Can you count from {a} to {b}?",
         "Please count from {a} to {b}.", "Count in words from {a} to {b}.",
         "Say the numbers from {a} to {b}."),
        ("Start at {a} and count to {b}.", "In words, count from {a} to {b}."),
    ),
    "haiku": (
        ("Write a haiku about {theme}.", "Write me a haiku about {theme}.",
         "Please write a haiku about {theme}.",
         "Can you write a haiku about {theme}?", "A haiku about {theme}, please.",
         "Make a haiku about {theme}.",
         "Compose a haiku about {theme}.", "I would like a haiku about {theme}.",
         "Give me a haiku about {theme}.",
         "Write a short haiku about {theme}.", "Write a short poem about {theme}.",
         "Tell me a haiku about {theme}.",
         "Write a haiku on {theme}.", "Could you write a haiku about {theme}?",
         "I want to read a haiku about {theme}."),
        ("Let me hear a haiku about {theme}.", "Create a haiku about {theme}.",
         "Do you know a haiku about {theme}?", "I need a haiku about {theme}."),
    ),
    "follow capital": (
        ("And of {x}?", "And the capital of {x}?", "What about {x}?", "And {x}?", "How about {x}?",
         "And what about {x}?", "Now {x}.", "The same for {x}, please."),
        ("And for {x}?", "Then what about {x}?"),
    ),
    "follow opposite": (
        ("And of {x}?", "And the opposite of {x}?", "What about {x}?", "And {x}?", "How about {x}?",
         "And what about {x}?", "Now {x}.", "The same for {x}, please."),
        ("And for {x}?", "Then what about {x}?"),
    ),
    "follow colour": (
        ("And {x}?", "What about {x}?", "How about {x}?", "And the colour of {x}?",
         "And what about {x}?",
         "Now {x}.", "The same for {x}, please."),
        ("And for {x}?", "Then what about {x}?"),
    ),
    "follow spell": (
        ("And {x}?", "What about {x}?", "How about {x}?", "And the word {x}?", "Now {x}.",
         "The same for {x}, please."),
        ("And for {x}?", "Then what about {x}?"),
    ),
    "follow haiku": (
        ("And about {x}?", "Now one about {x}.", "Another one about {x}, please.",
         "And one about {x}?"),
        ("One more about {x}.",),
    ),
}  # fmt: skip
