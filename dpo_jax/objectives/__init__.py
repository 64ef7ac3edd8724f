"""What is minimised: objectives as pure functions of arrays, and the table of them."""
