"""2 to 64 rows of x by weights whose groups are of 64 or 128 columns: wide loads, the tensor cores' integers."""
