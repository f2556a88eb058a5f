"""Results for people and programs: terminal, HTML, JSON, notebooks, figures."""
