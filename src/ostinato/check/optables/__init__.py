"""Op tables, one per torch version, and the maintainer's script that compares them with a real GPU."""
