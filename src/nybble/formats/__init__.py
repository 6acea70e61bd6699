"""What a number is: elements, blocks, schemes, tensors, and the search for scales. numpy and ml_dtypes only."""
