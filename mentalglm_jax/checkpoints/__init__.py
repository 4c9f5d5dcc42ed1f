"""Model and adapter directories in and out: Hugging Face, PEFT and its clients, Orbax."""
