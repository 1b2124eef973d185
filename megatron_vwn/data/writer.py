"""One data set on its way to disk, through Megatron's own builder."""

import logging
import warnings
from pathlib import Path

from megatron_vwn.data.encode import EncodedDocument
from megatron_vwn.data.indexed import Description, check_indexed_dataset, vocabulary_fingerprint
from megatron_vwn.data.tokenizer import LoadedTokenizer


class DatasetWriter:
    """Writes PATH.bin, PATH.idx and PATH.json.

    The first writer imports Megatron, which takes about ten seconds; it needs neither CUDA nor a process group.
    """

    def __init__(self, path: Path, tokenizer: LoadedTokenizer):
        # Megatron and torch complain at import about GPU libraries that writing a file does not need.
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(action="ignore"):
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        logging.disable(logging.NOTSET)

        self.path = path
        self.end_of_document = tokenizer.end_of_document
        self.vocabulary = tokenizer.token_of_id
        self.dtype = DType.optimal_dtype(max(self.vocabulary) + 1)
        self.builder = IndexedDatasetBuilder(f"{path}.bin", dtype=self.dtype)
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, document: EncodedDocument) -> None:
        """Append one document, whose ids end with the end of document."""
        self.builder.add_document(document.ids, [len(document.ids)])
        self.documents += 1
        self.tokens += len(document.ids)
        self.text_bytes += document.text_bytes

    def finish(self) -> Description:
        """Write the index and the description, and check the result like a training run does."""
        self.builder.finalize(f"{self.path}.idx")
        check_indexed_dataset(str(self.path))
        description = Description(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            vocabulary_size=max(self.vocabulary) + 1,
            vocabulary_sha256=vocabulary_fingerprint(self.vocabulary),
            end_of_document=self.end_of_document,
        )
        description.write(Path(f"{self.path}.json"))
        return description
