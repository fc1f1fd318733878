"""The commands, one module each: `main` takes the arguments behind the command's name and returns the exit status."""
