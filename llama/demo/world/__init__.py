"""The small world that the demo speaks of: its words, questions and passages."""
