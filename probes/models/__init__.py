"""The probed model: loading, laying a row out in tokens, scoring, verifying an export."""
