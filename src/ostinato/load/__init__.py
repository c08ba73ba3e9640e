"""Where weights come from: GGUF files, Hugging Face directories, the hub and the models that are known by name."""
