"""Thin adapters to optional packages."""
