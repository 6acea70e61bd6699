"""What a prompt is: token ids of a text, the text of token ids, the text of a conversation.

Knows the files of a folder that concern text (tokenizer.json, chat_template.jinja and a few keys of
the configurations). Knows neither tensors nor checkpoints, and never imports torch.
"""
