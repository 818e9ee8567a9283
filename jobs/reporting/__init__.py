"""What a run shows a person: summary.json, tables, charts and the report's page."""
