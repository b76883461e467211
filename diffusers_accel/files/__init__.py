"""Files that are read strictly and written whole.

`whole`: writing that leaves all or nothing, and asking ahead whether it can; `whole_folder`: the same of several files that
belong together. `lock`: one writer at a time. `reading`: bytes, and the system's errors in our words. `strict_json`: plain
data. `shaped`: data that a type describes. `safe_tensors`: tensors. `documents`: typed data with a format, a version and a
checksum, with tensors or without. `lines`: rows in a file that grows. `side_file`: the tensors of a plan. `errors`: what is
raised, and how a message quotes what it found. Nothing in a file is ever executed.
"""

from diffusers_accel.files.documents import (
    Kind,
    Schema,
    checksum,
    convert,
    load_document,
    load_tensor_document,
    parse_document,
    save_document,
    save_tensor_document,
)
from diffusers_accel.files.errors import FileError, FlushError, NewerFileError, WriteError, printable, quoted
from diffusers_accel.files.lines import append_line, check_appends, encode_line, read_lines
from diffusers_accel.files.lock import only_writer
from diffusers_accel.files.reading import read_bytes
from diffusers_accel.files.safe_tensors import TensorFile, check_tensors, encode_tensors, read_tensor_file
from diffusers_accel.files.shaped import built, shaped, tagged
from diffusers_accel.files.side_file import read_tensors, side_file
from diffusers_accel.files.strict_json import check_json, encode_json, parse_json, read_json, write_json
from diffusers_accel.files.whole import prepare_file, prepare_folder, sync_folder, write_together, write_whole
from diffusers_accel.files.whole_folder import prepare_whole_folder, whole_folder

__all__ = [
    "FileError",
    "FlushError",
    "NewerFileError",
    "Kind",
    "Schema",
    "TensorFile",
    "WriteError",
    "append_line",
    "check_appends",
    "built",
    "check_json",
    "check_tensors",
    "checksum",
    "convert",
    "encode_line",
    "encode_json",
    "encode_tensors",
    "load_document",
    "load_tensor_document",
    "only_writer",
    "parse_document",
    "parse_json",
    "prepare_file",
    "prepare_folder",
    "prepare_whole_folder",
    "printable",
    "quoted",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_tensor_file",
    "read_tensors",
    "save_document",
    "save_tensor_document",
    "shaped",
    "side_file",
    "sync_folder",
    "tagged",
    "whole_folder",
    "write_json",
    "write_together",
    "write_whole",
]
