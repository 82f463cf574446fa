"""Other people's libraries, met at their own interfaces. Nothing here is imported by the rest of pyflowmap."""
