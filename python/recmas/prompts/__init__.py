"""Prompts as text: rows, templates with slots, and their token ids. No torch here."""
