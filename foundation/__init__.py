"""What every package needs: expected failures, reading text from outside, writing a file whole or not at all. Standard
library only; imports nothing else of this project."""
