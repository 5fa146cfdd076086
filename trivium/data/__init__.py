"""From files to tokens: rows, prompts, demonstrations, preferences, and the batches they form."""
