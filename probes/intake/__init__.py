"""From plain text to rows that can be probed: prompts by template, a model's own tokens, answers."""
