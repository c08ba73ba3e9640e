"""What layers keep between steps: its storage, its pages, its budget."""
