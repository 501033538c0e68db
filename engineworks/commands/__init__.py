"""The commands, by what they are about. A command parses, calls one function and prints."""
