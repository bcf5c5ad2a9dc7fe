"""The content of the report page as plain data, one file a section."""
