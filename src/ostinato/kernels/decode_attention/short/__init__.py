"""Decode attention of short rows: a program for every 16 positions, one warp a query head."""
