"""A system behind an OpenAI-compatible interface: `settings` says how, `app` is the application, `server` runs it.

Importing this package imports neither torch nor a web framework.
"""
