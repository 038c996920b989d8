"""What others need to serve a saved model. `modelfile` writes it for Ollama."""
