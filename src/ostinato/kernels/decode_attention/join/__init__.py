"""Joining what several programs of decode attention found."""
