"""What a system is before anything is loaded: its pattern, its ``system.json``, where its models are. No torch."""
