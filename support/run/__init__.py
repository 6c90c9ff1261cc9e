"""The run: its folder, what it reports, its pictures and its page."""
