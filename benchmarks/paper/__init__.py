"""The paper's experiments (Section 5), a transformer beside them, and their small counterparts."""
