"""The steps of a round, one file each. No file, event or console is known here."""
