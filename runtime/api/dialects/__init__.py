"""The forms that clients speak: each reads a body into an `Ask`, and writes what is told of the answers."""
