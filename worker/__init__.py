"""The bridge: it takes jobs from the site's database, asks the engine, and writes the answers back."""
