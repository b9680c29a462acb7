"""Pages a person looks at: self-contained HTML with inline SVG and CSS, no network and no scripts.

Imports the nouns of what it shows (`runtime.serving`, `runtime.deployment`; of `runtime.planning` launch lines and KV
tiers) and nothing that prices or simulates.
"""
