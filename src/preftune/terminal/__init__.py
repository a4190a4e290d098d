"""What every floor of the house may need to say something in a terminal: numbers in words, and a bar."""
