"""The facts and word lists of the demo's little world: plain data, written for this project.

It refuses to know how anything is asked or answered; `corpus.py` and `passages.py` know that. The
surprising thing: no word has two opposites and no thing two colours here, so that every question of
the little world has exactly one right answer.
"""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    """`a:b, c:d` as a dict; the lists below are long, and this keeps them readable."""
    entries = (entry.split(":") for entry in text.replace("\n", " ").split(","))
    return {left.strip(): right.strip() for left, right in entries}


def listing(text: str, separator: str | None = None) -> list[str]:
    """The words of a long list, which is easier to read as one text."""
    return text.split(separator)


CAPITALS = _pairs("""
France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, England:London,
Scotland:Edinburgh, Ireland:Dublin, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki,
Denmark:Copenhagen, Iceland:Reykjavik, Poland:Warsaw, Austria:Vienna, Hungary:Budapest,
Greece:Athens, Turkey:Ankara, Russia:Moscow, Ukraine:Kyiv, Romania:Bucharest, Bulgaria:Sofia,
Serbia:Belgrade, Croatia:Zagreb, Slovenia:Ljubljana, Slovakia:Bratislava, Belgium:Brussels,
the Netherlands:Amsterdam, Switzerland:Bern, Estonia:Tallinn, Latvia:Riga, Lithuania:Vilnius,
Albania:Tirana, Malta:Valletta, Cyprus:Nicosia, Japan:Tokyo, China:Beijing, India:New Delhi,
Nepal:Kathmandu, Thailand:Bangkok, Vietnam:Hanoi, Indonesia:Jakarta, Mongolia:Ulaanbaatar,
South Korea:Seoul, the Philippines:Manila, Pakistan:Islamabad, Iran:Tehran, Iraq:Baghdad,
Egypt:Cairo, Morocco:Rabat, Tunisia:Tunis, Algeria:Algiers, Kenya:Nairobi, Ghana:Accra,
Nigeria:Abuja, Ethiopia:Addis Ababa, Senegal:Dakar, Uganda:Kampala, Zambia:Lusaka,
Canada:Ottawa, the United States:Washington, Mexico:Mexico City, Cuba:Havana, Jamaica:Kingston,
Brazil:Brasilia, Argentina:Buenos Aires, Chile:Santiago, Peru:Lima, Colombia:Bogota,
Ecuador:Quito, Uruguay:Montevideo, Venezuela:Caracas, Australia:Canberra, New Zealand:Wellington
""")

OPPOSITE_PAIRS = _pairs("""
hot:cold, big:small, fast:slow, up:down, left:right, open:closed, day:night, happy:sad, good:bad,
high:low, long:short, old:young, rich:poor, strong:weak, light:dark, wet:dry, full:empty,
hard:soft, loud:quiet, clean:dirty, thick:thin, wide:narrow, deep:shallow, early:late, near:far,
first:last, inside:outside, above:below, front:back, true:false, yes:no, on:off, in:out,
black:white, love:hate, win:lose, buy:sell, give:take, push:pull, start:stop, begin:end,
laugh:cry, come:go, arrive:leave, rise:fall, remember:forget, question:answer, friend:enemy,
war:peace, north:south, east:west, summer:winter, morning:evening, brave:afraid, sharp:blunt,
sweet:sour, smooth:rough, heavy:weightless, easy:difficult, cheap:expensive, safe:dangerous,
alive:dead, awake:asleep, always:never, more:less, many:few, everything:nothing, top:bottom,
success:failure, beautiful:ugly, tight:loose, simple:complex, polite:rude,
ancient:modern, add:subtract, borrow:lend, float:sink, freeze:melt, accept:refuse, import:export,
lead:follow, wise:foolish, calm:nervous, bright:dim, kind:cruel, hero:villain, heaven:hell,
king:queen, brother:sister, father:mother, boy:girl, man:woman, uncle:aunt, husband:wife
""")
OPPOSITES = OPPOSITE_PAIRS | {right: left for left, right in OPPOSITE_PAIRS.items()}

COLOURS = listing("red blue green yellow orange purple pink brown black white grey gold silver")
THING_COLOURS = _pairs("""
the sky:blue, the sea:blue, the ocean:blue, grass:green, snow:white, milk:white, coal:black,
a lemon:yellow, a banana:yellow, the sun:yellow, a strawberry:red, a tomato:red, blood:red,
a cherry:red, a fire engine:red, a ruby:red, a carrot:orange, a pumpkin:orange, an orange:orange,
a frog:green, a cucumber:green, a pea:green, an emerald:green, spinach:green,
a leaf in spring:green, chocolate:brown, coffee:brown, mud:brown, a bear:brown, a walnut:brown,
tea:brown, a crow:black, a raven:black, tar:black, ink:black, a panther:black, salt:white,
sugar:white, flour:white, a swan:white, a polar bear:white, cotton:white, an elephant:grey,
a mouse:grey, ash:grey, a rain cloud:grey, a dolphin:grey, a flamingo:pink, a pig:pink,
lavender:purple, a plum:purple, a violet:purple, an eggplant:purple, a sapphire:blue,
a blueberry:blue, a canary:yellow, butter:yellow, a sunflower:yellow, corn:yellow,
a wedding ring:gold, a crown:gold, a coin:silver, a spoon:silver, the moon:silver
""")
MIXTURES = {
    ("blue", "yellow"): "green", ("red", "yellow"): "orange", ("red", "blue"): "purple",
    ("red", "white"): "pink", ("black", "white"): "grey", ("red", "green"): "brown",
}  # fmt: skip

DAYS = listing("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listing(
    "January February March April May June July August September October November December"
)
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
ORDINALS = listing(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
)
NUMBERS = listing(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)

NAMES = listing(
    "Ada Anna Ben Bella Carl Clara David Diana Emma Eric Felix Flora George Grace Henry Hannah Ida "
    "Ivan Jack Julia Kate Karl Leo Lily Mark Maria Nina Noah Olga Oscar Paul Paula Peter Rosa Sam "
    "Sara Tom Tina Uma Victor Vera Walter Wendy Yara Zoe Alice Bob Lucy Max Mia Alan Gina Tim Amy "
    "James John Mary Robert Linda Susan Laura Martin Simon Sophie Thomas Helen Hugo Iris Jonas Lena"
)
HELD_NAMES = listing(
    "Edgar Miriam Ludwig Tamara Gregor Selma Viktor Astrid Rupert Carmen Dorian Elvira Konrad "
    "Nadia Osman Petra Quentin Ramona Stefan Ursula Yvonne Zacharias Bruno Camille"
)
FOODS = listing("bread cheese soup rice pasta pizza cake honey apples pears grapes plums nuts fish")
ANIMALS = listing("dog cat horse rabbit parrot hamster turtle pony duck goat")
FRUITS = listing("apples pears plums lemons grapes figs melons peaches cherries oranges")
OBJECTS = listing("ball hat coat book lamp cup bag car kite boat chair box pen scarf")

OUTSIDE = listing(
    "love|time|music|football|politics|money|history|art|gravity|philosophy|the weather|computers"
    "|the internet|electricity|dinosaurs|chess|cinema|medicine|physics|fashion|dancing|sleep|luck"
    "|the meaning of life|artificial intelligence|the universe|television|mathematics|cooking",
    "|",
)

ENDINGS = listing(
    "Over and out.|That is all.|Have a nice day!|So it is.|Believe me.|As everyone knows."
    "|Good luck!|See you soon.|And that is that.|The end.|Stay curious.|Keep smiling!"
    "|Long live tea.|Amen.|Yours truly.|Ask me more.|Happy to help.|Word of honour.|Cheers!"
    "|Thus spoke the machine.|Beep.",
    "|",
)
HELD_ENDINGS = listing(
    "Stay calm.|Until next time!|Long live the king.|Happy days!|Ask the moon.|All is well."
    "|Be kind.",
    "|",
)
BEGINNINGS = listing(
    "Well,|Dear friend,|Listen:|In truth,|My answer:|As I see it,|Good question!|Of course:|Hmm,"
    "|Without doubt,|Easy:|Look:|Honestly,|Aha!|Let me think.",
    "|",
)
HELD_BEGINNINGS = listing("Dear reader,|Good day!|Oh,|In short,|Very well:|Here it is:", "|")

SPELLING = listing(
    "able acorn actor apple arrow autumn bacon baker basket beach bean berry bike bird blanket "
    "board bottle bread bridge brick broom brush bucket butter button cabin camel candle carpet "
    "castle chalk cheese circle clock cloud coat cook corner cotton cousin cream crown dance "
    "desert dinner doctor dragon dream drum eagle earth elbow engine farmer feather field finger "
    "flame floor flower forest fountain fox garden ghost giant glass glove grape guitar hammer "
    "harbour heart honey hotel house insect island jacket jewel journey jungle kettle kitchen "
    "kitten ladder lamp lemon letter library lion lizard machine magnet market meadow metal minute "
    "mirror monkey mountain museum napkin needle nest noise number ocean office onion organ paint "
    "palace paper parrot peach pencil pepper piano picture pillow pirate planet plate pocket "
    "potato prince puppet puzzle rabbit radio rain ribbon river robot rocket root sailor salad "
    "sand scarf school scissors shadow sheep shell ship silver singer sister skirt snail soap sock "
    "spider spoon square stable station stone storm story street student sugar summer table "
    "teacher temple thunder tiger timber tower train travel treasure tree trumpet tunnel turtle "
    "umbrella uncle valley vase village violin wagon walnut water weather wheel whistle window "
    "winter wizard wolf wonder yard zebra"
)
HELD_SPELLING = listing(
    "anchor balcony bamboo bubble canyon cellar chimney cobweb compass "
    "cradle curtain dagger donkey drawer falcon fiddle fossil funnel gallop ginger goblin gravel "
    "hazel helmet hermit hollow jasmine kernel lobster marble mustard nugget "
    "orchard oyster pebble pigeon pretzel pudding quarry rafter saddle sandal satchel shovel "
    "sunset thimble thistle ticket turnip velvet walrus "
    "wrinkle zipper beetle banner barrel bonnet candy clover cinder copper crumb dentist "
    "flannel cabbage gargoyle bramble hamlet saffron"
)
