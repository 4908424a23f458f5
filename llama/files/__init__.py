"""Small files that somebody else wrote, read strictly; checklists; files that appear whole."""
