"""`make gpu-check`: what a session with a card runs. `check` is the program; the other files are its stages."""
