"""The command line: its commands, and the demos with what they need."""
