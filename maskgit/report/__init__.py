"""What is shown to a person: pictures, tables, progress, and what this machine can do."""
