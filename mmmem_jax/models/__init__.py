"""Network definitions: small parts, each loadable from local files."""
