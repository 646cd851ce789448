"""One frozen language model: what it is (`model`), what it does (`agent`), how it writes (`decoding`, `sampling`)."""
