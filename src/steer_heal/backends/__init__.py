"""Optional packages behind small interfaces."""
