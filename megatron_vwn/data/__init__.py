"""From text to token windows: documents, tokenizer, Megatron's .bin and .idx files, DALI (``vwn-prepare-data``)."""
