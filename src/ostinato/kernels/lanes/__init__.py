"""What the lanes of a warp and the warps of a program give each other, by hand."""
