"""OpenAI's Images API over our own jobs: for clients that know no other."""
