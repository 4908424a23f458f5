"""What a command shares with its terminal: arguments, lines in and out, progress. No torch."""
