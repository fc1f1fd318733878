"""What people read of a run: console lines, pictures, the page. Made from events alone."""
