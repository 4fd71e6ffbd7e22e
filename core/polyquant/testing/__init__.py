"""The conformance suite for backends; `BackendConformance` is the class that a plugin's tests derive from."""
