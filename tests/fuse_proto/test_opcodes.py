from errno import EIO, ENOSYS, ENOTTY, EROFS

from appliance.fuse_proto._fuse_wire import CODECS, Opcode
from appliance.fuse_proto.opcodes import DATA, OPS, Answer
from appliance.fuse_proto.operations import Operations

BY_NAME = {op.name: op for op in OPS}


def named(answer: Answer | int) -> set[str]:
    return {op.name for op in OPS if op.answer == answer}


def test_whatever_changes_the_tree_is_erofs() -> None:
    names = {"SETATTR", "SYMLINK", "MKNOD", "MKDIR", "UNLINK", "RMDIR", "RENAME", "LINK", "WRITE"}
    names |= {"SETXATTR", "REMOVEXATTR", "CREATE", "FALLOCATE", "RENAME2", "TMPFILE"}
    names |= {"COPY_FILE_RANGE", "COPY_FILE_RANGE_64"}
    assert named(EROFS) == names


def test_whatever_the_kernel_does_without_is_enosys() -> None:
    names = {"FSYNC", "FLUSH", "FSYNCDIR", "GETLK", "SETLK", "SETLKW", "BMAP", "POLL", "SYNCFS"}
    assert named(ENOSYS) == names | {"SETUPMAPPING", "REMOVEMAPPING"}


def test_forgetting_and_interrupting_have_no_reply() -> None:
    assert named(Answer.NOTHING) == {"FORGET", "BATCH_FORGET", "INTERRUPT", "NOTIFY_REPLY"}


def test_the_session_answers_init_and_destroy() -> None:
    assert named(Answer.SESSION) == {"INIT", "DESTROY"}


def test_other_fixed_answers() -> None:
    assert named(0) == {"RELEASEDIR"}
    assert named(ENOTTY) == {"IOCTL"}
    assert named(EIO) == {"INIT_BSWAP_RESERVED"}


def test_each_operation_has_one_method_and_each_method_an_opcode() -> None:
    methods = {name for name in vars(Operations) if not name.startswith("_")}
    assert methods == {name.lower() for name in named(Answer.OPERATIONS)}


def test_only_session_and_silent_opcodes_may_come_before_init() -> None:
    early = {op.name for op in OPS if op.is_early}
    silent = named(Answer.NOTHING) | named(Answer.SESSION)
    assert early == silent | {"INIT_BSWAP_RESERVED"}


def test_rows_are_unique_and_name_structures_that_exist() -> None:
    assert len({op.number for op in OPS}) == len(BY_NAME) == len(OPS) == len(Opcode)
    for op in OPS:
        assert not op.args or op.args in CODECS
        assert op.reply == DATA or all(name in CODECS for name in op.reply.split())
        assert op.compat < (CODECS[op.args].size if op.args else 1)
