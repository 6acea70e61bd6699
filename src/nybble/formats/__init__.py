"""What a number is: elements, blocks, schemes, tensors, scale search. numpy and ml_dtypes only."""
