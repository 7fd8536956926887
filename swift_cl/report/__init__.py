"""Results on disk to Markdown, HTML, a plot and a table in the terminal."""
