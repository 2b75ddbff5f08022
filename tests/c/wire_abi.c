/* Generated from the wire tables by `python -m tools.wiregen`; do not edit. */
#include <stddef.h>
#include <linux/fuse.h>

#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define FIELD(type, field, offset, size)                                 \
	_Static_assert(offsetof(type, field) == (offset) &&              \
		       sizeof(((type *)0)->field) == (size), #type "." #field)
#define VALUE(name, value) _Static_assert((name) == (value), #name)

VALUE(FUSE_LOOKUP, 0x1ULL);
VALUE(FUSE_FORGET, 0x2ULL);
VALUE(FUSE_GETATTR, 0x3ULL);
VALUE(FUSE_SETATTR, 0x4ULL);
VALUE(FUSE_READLINK, 0x5ULL);
VALUE(FUSE_SYMLINK, 0x6ULL);
VALUE(FUSE_MKNOD, 0x8ULL);
VALUE(FUSE_MKDIR, 0x9ULL);
VALUE(FUSE_UNLINK, 0xaULL);
VALUE(FUSE_RMDIR, 0xbULL);
VALUE(FUSE_RENAME, 0xcULL);
VALUE(FUSE_LINK, 0xdULL);
VALUE(FUSE_OPEN, 0xeULL);
VALUE(FUSE_READ, 0xfULL);
VALUE(FUSE_WRITE, 0x10ULL);
VALUE(FUSE_STATFS, 0x11ULL);
VALUE(FUSE_RELEASE, 0x12ULL);
VALUE(FUSE_FSYNC, 0x14ULL);
VALUE(FUSE_SETXATTR, 0x15ULL);
VALUE(FUSE_GETXATTR, 0x16ULL);
VALUE(FUSE_LISTXATTR, 0x17ULL);
VALUE(FUSE_REMOVEXATTR, 0x18ULL);
VALUE(FUSE_FLUSH, 0x19ULL);
VALUE(FUSE_INIT, 0x1aULL);
VALUE(FUSE_OPENDIR, 0x1bULL);
VALUE(FUSE_READDIR, 0x1cULL);
VALUE(FUSE_RELEASEDIR, 0x1dULL);
VALUE(FUSE_FSYNCDIR, 0x1eULL);
VALUE(FUSE_GETLK, 0x1fULL);
VALUE(FUSE_SETLK, 0x20ULL);
VALUE(FUSE_SETLKW, 0x21ULL);
VALUE(FUSE_ACCESS, 0x22ULL);
VALUE(FUSE_CREATE, 0x23ULL);
VALUE(FUSE_INTERRUPT, 0x24ULL);
VALUE(FUSE_BMAP, 0x25ULL);
VALUE(FUSE_DESTROY, 0x26ULL);
VALUE(FUSE_IOCTL, 0x27ULL);
VALUE(FUSE_POLL, 0x28ULL);
VALUE(FUSE_NOTIFY_REPLY, 0x29ULL);
VALUE(FUSE_BATCH_FORGET, 0x2aULL);
VALUE(FUSE_FALLOCATE, 0x2bULL);
VALUE(FUSE_READDIRPLUS, 0x2cULL);
VALUE(FUSE_RENAME2, 0x2dULL);
VALUE(FUSE_LSEEK, 0x2eULL);
VALUE(FUSE_COPY_FILE_RANGE, 0x2fULL);
#if FUSE_KERNEL_MINOR_VERSION >= 31
VALUE(FUSE_SETUPMAPPING, 0x30ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 31
VALUE(FUSE_REMOVEMAPPING, 0x31ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 34
VALUE(FUSE_SYNCFS, 0x32ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 37
VALUE(FUSE_TMPFILE, 0x33ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 39
VALUE(FUSE_STATX, 0x34ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 45
VALUE(FUSE_COPY_FILE_RANGE_64, 0x35ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 33
VALUE(FUSE_INIT_BSWAP_RESERVED, 0x1a000000ULL);
#endif

VALUE(FUSE_ASYNC_READ, 0x1ULL);
VALUE(FUSE_POSIX_LOCKS, 0x2ULL);
VALUE(FUSE_FILE_OPS, 0x4ULL);
VALUE(FUSE_ATOMIC_O_TRUNC, 0x8ULL);
VALUE(FUSE_EXPORT_SUPPORT, 0x10ULL);
VALUE(FUSE_BIG_WRITES, 0x20ULL);
VALUE(FUSE_DONT_MASK, 0x40ULL);
VALUE(FUSE_SPLICE_WRITE, 0x80ULL);
VALUE(FUSE_SPLICE_MOVE, 0x100ULL);
VALUE(FUSE_SPLICE_READ, 0x200ULL);
VALUE(FUSE_FLOCK_LOCKS, 0x400ULL);
VALUE(FUSE_HAS_IOCTL_DIR, 0x800ULL);
VALUE(FUSE_AUTO_INVAL_DATA, 0x1000ULL);
VALUE(FUSE_DO_READDIRPLUS, 0x2000ULL);
VALUE(FUSE_READDIRPLUS_AUTO, 0x4000ULL);
VALUE(FUSE_ASYNC_DIO, 0x8000ULL);
VALUE(FUSE_WRITEBACK_CACHE, 0x10000ULL);
VALUE(FUSE_NO_OPEN_SUPPORT, 0x20000ULL);
VALUE(FUSE_PARALLEL_DIROPS, 0x40000ULL);
VALUE(FUSE_HANDLE_KILLPRIV, 0x80000ULL);
VALUE(FUSE_POSIX_ACL, 0x100000ULL);
VALUE(FUSE_ABORT_ERROR, 0x200000ULL);
VALUE(FUSE_MAX_PAGES, 0x400000ULL);
VALUE(FUSE_CACHE_SYMLINKS, 0x800000ULL);
VALUE(FUSE_NO_OPENDIR_SUPPORT, 0x1000000ULL);
VALUE(FUSE_EXPLICIT_INVAL_DATA, 0x2000000ULL);
#if FUSE_KERNEL_MINOR_VERSION >= 31
VALUE(FUSE_MAP_ALIGNMENT, 0x4000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 32
VALUE(FUSE_SUBMOUNTS, 0x8000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 33
VALUE(FUSE_HANDLE_KILLPRIV_V2, 0x10000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 33
VALUE(FUSE_SETXATTR_EXT, 0x20000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 36
VALUE(FUSE_INIT_EXT, 0x40000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 36
VALUE(FUSE_SECURITY_CTX, 0x100000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 36
VALUE(FUSE_HAS_INODE_DAX, 0x200000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 39
VALUE(FUSE_CREATE_SUPP_GROUP, 0x400000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 39
VALUE(FUSE_HAS_EXPIRE_ONLY, 0x800000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 39
VALUE(FUSE_DIRECT_IO_ALLOW_MMAP, 0x1000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 40
VALUE(FUSE_PASSTHROUGH, 0x2000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 40
VALUE(FUSE_NO_EXPORT_SUPPORT, 0x4000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 40
VALUE(FUSE_HAS_RESEND, 0x8000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 41
VALUE(FUSE_ALLOW_IDMAP, 0x10000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 42
VALUE(FUSE_OVER_IO_URING, 0x20000000000ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 43
VALUE(FUSE_REQUEST_TIMEOUT, 0x40000000000ULL);
#endif

VALUE(FOPEN_DIRECT_IO, 0x1ULL);
VALUE(FOPEN_KEEP_CACHE, 0x2ULL);
VALUE(FOPEN_NONSEEKABLE, 0x4ULL);
VALUE(FOPEN_CACHE_DIR, 0x8ULL);
VALUE(FOPEN_STREAM, 0x10ULL);
#if FUSE_KERNEL_MINOR_VERSION >= 35
VALUE(FOPEN_NOFLUSH, 0x20ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 38
VALUE(FOPEN_PARALLEL_DIRECT_WRITES, 0x40ULL);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 40
VALUE(FOPEN_PASSTHROUGH, 0x80ULL);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 40
VALUE(FUSE_NOTIFY_RESEND, 0x7ULL);
#endif

VALUE(FUSE_GETATTR_FH, 0x1ULL);

VALUE(FUSE_ATTR_SUBMOUNT, 0x1ULL);
#if FUSE_KERNEL_MINOR_VERSION >= 36
VALUE(FUSE_ATTR_DAX, 0x2ULL);
#endif

SIZE(struct fuse_in_header, 40);
FIELD(struct fuse_in_header, len, 0, 4);
FIELD(struct fuse_in_header, opcode, 4, 4);
FIELD(struct fuse_in_header, unique, 8, 8);
FIELD(struct fuse_in_header, nodeid, 16, 8);
FIELD(struct fuse_in_header, uid, 24, 4);
FIELD(struct fuse_in_header, gid, 28, 4);
FIELD(struct fuse_in_header, pid, 32, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 38
FIELD(struct fuse_in_header, total_extlen, 36, 2);
#endif

SIZE(struct fuse_out_header, 16);
FIELD(struct fuse_out_header, len, 0, 4);
FIELD(struct fuse_out_header, error, 4, 4);
FIELD(struct fuse_out_header, unique, 8, 8);

SIZE(struct fuse_attr, 88);
FIELD(struct fuse_attr, ino, 0, 8);
FIELD(struct fuse_attr, size, 8, 8);
FIELD(struct fuse_attr, blocks, 16, 8);
FIELD(struct fuse_attr, atime, 24, 8);
FIELD(struct fuse_attr, mtime, 32, 8);
FIELD(struct fuse_attr, ctime, 40, 8);
FIELD(struct fuse_attr, atimensec, 48, 4);
FIELD(struct fuse_attr, mtimensec, 52, 4);
FIELD(struct fuse_attr, ctimensec, 56, 4);
FIELD(struct fuse_attr, mode, 60, 4);
FIELD(struct fuse_attr, nlink, 64, 4);
FIELD(struct fuse_attr, uid, 68, 4);
FIELD(struct fuse_attr, gid, 72, 4);
FIELD(struct fuse_attr, rdev, 76, 4);
FIELD(struct fuse_attr, blksize, 80, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 32
FIELD(struct fuse_attr, flags, 84, 4);
#endif

SIZE(struct fuse_entry_out, 128);
FIELD(struct fuse_entry_out, nodeid, 0, 8);
FIELD(struct fuse_entry_out, generation, 8, 8);
FIELD(struct fuse_entry_out, entry_valid, 16, 8);
FIELD(struct fuse_entry_out, attr_valid, 24, 8);
FIELD(struct fuse_entry_out, entry_valid_nsec, 32, 4);
FIELD(struct fuse_entry_out, attr_valid_nsec, 36, 4);
FIELD(struct fuse_entry_out, attr, 40, 88);

SIZE(struct fuse_attr_out, 104);
FIELD(struct fuse_attr_out, attr_valid, 0, 8);
FIELD(struct fuse_attr_out, attr_valid_nsec, 8, 4);
FIELD(struct fuse_attr_out, attr, 16, 88);

SIZE(struct fuse_forget_in, 8);
FIELD(struct fuse_forget_in, nlookup, 0, 8);

SIZE(struct fuse_forget_one, 16);
FIELD(struct fuse_forget_one, nodeid, 0, 8);
FIELD(struct fuse_forget_one, nlookup, 8, 8);

SIZE(struct fuse_batch_forget_in, 8);
FIELD(struct fuse_batch_forget_in, count, 0, 4);

SIZE(struct fuse_getattr_in, 16);
FIELD(struct fuse_getattr_in, getattr_flags, 0, 4);
FIELD(struct fuse_getattr_in, fh, 8, 8);

SIZE(struct fuse_setattr_in, 88);
FIELD(struct fuse_setattr_in, valid, 0, 4);
FIELD(struct fuse_setattr_in, fh, 8, 8);
FIELD(struct fuse_setattr_in, size, 16, 8);
FIELD(struct fuse_setattr_in, lock_owner, 24, 8);
FIELD(struct fuse_setattr_in, atime, 32, 8);
FIELD(struct fuse_setattr_in, mtime, 40, 8);
FIELD(struct fuse_setattr_in, ctime, 48, 8);
FIELD(struct fuse_setattr_in, atimensec, 56, 4);
FIELD(struct fuse_setattr_in, mtimensec, 60, 4);
FIELD(struct fuse_setattr_in, ctimensec, 64, 4);
FIELD(struct fuse_setattr_in, mode, 68, 4);
FIELD(struct fuse_setattr_in, uid, 76, 4);
FIELD(struct fuse_setattr_in, gid, 80, 4);

SIZE(struct fuse_mknod_in, 16);
FIELD(struct fuse_mknod_in, mode, 0, 4);
FIELD(struct fuse_mknod_in, rdev, 4, 4);
FIELD(struct fuse_mknod_in, umask, 8, 4);

SIZE(struct fuse_mkdir_in, 8);
FIELD(struct fuse_mkdir_in, mode, 0, 4);
FIELD(struct fuse_mkdir_in, umask, 4, 4);

SIZE(struct fuse_rename_in, 8);
FIELD(struct fuse_rename_in, newdir, 0, 8);

SIZE(struct fuse_rename2_in, 16);
FIELD(struct fuse_rename2_in, newdir, 0, 8);
FIELD(struct fuse_rename2_in, flags, 8, 4);

SIZE(struct fuse_link_in, 8);
FIELD(struct fuse_link_in, oldnodeid, 0, 8);

SIZE(struct fuse_open_in, 8);
FIELD(struct fuse_open_in, flags, 0, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 33
FIELD(struct fuse_open_in, open_flags, 4, 4);
#endif

SIZE(struct fuse_open_out, 16);
FIELD(struct fuse_open_out, fh, 0, 8);
FIELD(struct fuse_open_out, open_flags, 8, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 40
FIELD(struct fuse_open_out, backing_id, 12, 4);
#endif

SIZE(struct fuse_create_in, 16);
FIELD(struct fuse_create_in, flags, 0, 4);
FIELD(struct fuse_create_in, mode, 4, 4);
FIELD(struct fuse_create_in, umask, 8, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 33
FIELD(struct fuse_create_in, open_flags, 12, 4);
#endif

SIZE(struct fuse_release_in, 24);
FIELD(struct fuse_release_in, fh, 0, 8);
FIELD(struct fuse_release_in, flags, 8, 4);
FIELD(struct fuse_release_in, release_flags, 12, 4);
FIELD(struct fuse_release_in, lock_owner, 16, 8);

SIZE(struct fuse_flush_in, 24);
FIELD(struct fuse_flush_in, fh, 0, 8);
FIELD(struct fuse_flush_in, lock_owner, 16, 8);

SIZE(struct fuse_read_in, 40);
FIELD(struct fuse_read_in, fh, 0, 8);
FIELD(struct fuse_read_in, offset, 8, 8);
FIELD(struct fuse_read_in, size, 16, 4);
FIELD(struct fuse_read_in, read_flags, 20, 4);
FIELD(struct fuse_read_in, lock_owner, 24, 8);
FIELD(struct fuse_read_in, flags, 32, 4);

SIZE(struct fuse_write_in, 40);
FIELD(struct fuse_write_in, fh, 0, 8);
FIELD(struct fuse_write_in, offset, 8, 8);
FIELD(struct fuse_write_in, size, 16, 4);
FIELD(struct fuse_write_in, write_flags, 20, 4);
FIELD(struct fuse_write_in, lock_owner, 24, 8);
FIELD(struct fuse_write_in, flags, 32, 4);

SIZE(struct fuse_write_out, 8);
FIELD(struct fuse_write_out, size, 0, 4);

SIZE(struct fuse_kstatfs, 80);
FIELD(struct fuse_kstatfs, blocks, 0, 8);
FIELD(struct fuse_kstatfs, bfree, 8, 8);
FIELD(struct fuse_kstatfs, bavail, 16, 8);
FIELD(struct fuse_kstatfs, files, 24, 8);
FIELD(struct fuse_kstatfs, ffree, 32, 8);
FIELD(struct fuse_kstatfs, bsize, 40, 4);
FIELD(struct fuse_kstatfs, namelen, 44, 4);
FIELD(struct fuse_kstatfs, frsize, 48, 4);

SIZE(struct fuse_statfs_out, 80);
FIELD(struct fuse_statfs_out, st, 0, 80);

SIZE(struct fuse_fsync_in, 16);
FIELD(struct fuse_fsync_in, fh, 0, 8);
FIELD(struct fuse_fsync_in, fsync_flags, 8, 4);

#if FUSE_KERNEL_MINOR_VERSION >= 33
SIZE(struct fuse_setxattr_in, 16);
FIELD(struct fuse_setxattr_in, size, 0, 4);
FIELD(struct fuse_setxattr_in, flags, 4, 4);
FIELD(struct fuse_setxattr_in, setxattr_flags, 8, 4);
#endif

SIZE(struct fuse_getxattr_in, 8);
FIELD(struct fuse_getxattr_in, size, 0, 4);

SIZE(struct fuse_getxattr_out, 8);
FIELD(struct fuse_getxattr_out, size, 0, 4);

SIZE(struct fuse_file_lock, 24);
FIELD(struct fuse_file_lock, start, 0, 8);
FIELD(struct fuse_file_lock, end, 8, 8);
FIELD(struct fuse_file_lock, type, 16, 4);
FIELD(struct fuse_file_lock, pid, 20, 4);

SIZE(struct fuse_lk_in, 48);
FIELD(struct fuse_lk_in, fh, 0, 8);
FIELD(struct fuse_lk_in, owner, 8, 8);
FIELD(struct fuse_lk_in, lk, 16, 24);
FIELD(struct fuse_lk_in, lk_flags, 40, 4);

SIZE(struct fuse_lk_out, 24);
FIELD(struct fuse_lk_out, lk, 0, 24);

SIZE(struct fuse_access_in, 8);
FIELD(struct fuse_access_in, mask, 0, 4);

#if FUSE_KERNEL_MINOR_VERSION >= 36
SIZE(struct fuse_init_in, 64);
FIELD(struct fuse_init_in, major, 0, 4);
FIELD(struct fuse_init_in, minor, 4, 4);
FIELD(struct fuse_init_in, max_readahead, 8, 4);
FIELD(struct fuse_init_in, flags, 12, 4);
FIELD(struct fuse_init_in, flags2, 16, 4);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 36
SIZE(struct fuse_init_out, 64);
FIELD(struct fuse_init_out, major, 0, 4);
FIELD(struct fuse_init_out, minor, 4, 4);
FIELD(struct fuse_init_out, max_readahead, 8, 4);
FIELD(struct fuse_init_out, flags, 12, 4);
FIELD(struct fuse_init_out, max_background, 16, 2);
FIELD(struct fuse_init_out, congestion_threshold, 18, 2);
FIELD(struct fuse_init_out, max_write, 20, 4);
FIELD(struct fuse_init_out, time_gran, 24, 4);
FIELD(struct fuse_init_out, max_pages, 28, 2);
FIELD(struct fuse_init_out, map_alignment, 30, 2);
FIELD(struct fuse_init_out, flags2, 32, 4);
#if FUSE_KERNEL_MINOR_VERSION >= 40
FIELD(struct fuse_init_out, max_stack_depth, 36, 4);
#endif
#if FUSE_KERNEL_MINOR_VERSION >= 43
FIELD(struct fuse_init_out, request_timeout, 40, 2);
#endif
#endif

SIZE(struct fuse_interrupt_in, 8);
FIELD(struct fuse_interrupt_in, unique, 0, 8);

SIZE(struct fuse_bmap_in, 16);
FIELD(struct fuse_bmap_in, block, 0, 8);
FIELD(struct fuse_bmap_in, blocksize, 8, 4);

SIZE(struct fuse_bmap_out, 8);
FIELD(struct fuse_bmap_out, block, 0, 8);

SIZE(struct fuse_ioctl_in, 32);
FIELD(struct fuse_ioctl_in, fh, 0, 8);
FIELD(struct fuse_ioctl_in, flags, 8, 4);
FIELD(struct fuse_ioctl_in, cmd, 12, 4);
FIELD(struct fuse_ioctl_in, arg, 16, 8);
FIELD(struct fuse_ioctl_in, in_size, 24, 4);
FIELD(struct fuse_ioctl_in, out_size, 28, 4);

SIZE(struct fuse_ioctl_out, 16);
FIELD(struct fuse_ioctl_out, result, 0, 4);
FIELD(struct fuse_ioctl_out, flags, 4, 4);
FIELD(struct fuse_ioctl_out, in_iovs, 8, 4);
FIELD(struct fuse_ioctl_out, out_iovs, 12, 4);

SIZE(struct fuse_poll_in, 24);
FIELD(struct fuse_poll_in, fh, 0, 8);
FIELD(struct fuse_poll_in, kh, 8, 8);
FIELD(struct fuse_poll_in, flags, 16, 4);
FIELD(struct fuse_poll_in, events, 20, 4);

SIZE(struct fuse_poll_out, 8);
FIELD(struct fuse_poll_out, revents, 0, 4);

SIZE(struct fuse_fallocate_in, 32);
FIELD(struct fuse_fallocate_in, fh, 0, 8);
FIELD(struct fuse_fallocate_in, offset, 8, 8);
FIELD(struct fuse_fallocate_in, length, 16, 8);
FIELD(struct fuse_fallocate_in, mode, 24, 4);

SIZE(struct fuse_lseek_in, 24);
FIELD(struct fuse_lseek_in, fh, 0, 8);
FIELD(struct fuse_lseek_in, offset, 8, 8);
FIELD(struct fuse_lseek_in, whence, 16, 4);

SIZE(struct fuse_lseek_out, 8);
FIELD(struct fuse_lseek_out, offset, 0, 8);

SIZE(struct fuse_copy_file_range_in, 56);
FIELD(struct fuse_copy_file_range_in, fh_in, 0, 8);
FIELD(struct fuse_copy_file_range_in, off_in, 8, 8);
FIELD(struct fuse_copy_file_range_in, nodeid_out, 16, 8);
FIELD(struct fuse_copy_file_range_in, fh_out, 24, 8);
FIELD(struct fuse_copy_file_range_in, off_out, 32, 8);
FIELD(struct fuse_copy_file_range_in, len, 40, 8);
FIELD(struct fuse_copy_file_range_in, flags, 48, 8);

#if FUSE_KERNEL_MINOR_VERSION >= 45
SIZE(struct fuse_copy_file_range_out, 8);
FIELD(struct fuse_copy_file_range_out, bytes_copied, 0, 8);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 31
SIZE(struct fuse_setupmapping_in, 40);
FIELD(struct fuse_setupmapping_in, fh, 0, 8);
FIELD(struct fuse_setupmapping_in, foffset, 8, 8);
FIELD(struct fuse_setupmapping_in, len, 16, 8);
FIELD(struct fuse_setupmapping_in, flags, 24, 8);
FIELD(struct fuse_setupmapping_in, moffset, 32, 8);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 31
SIZE(struct fuse_removemapping_in, 4);
FIELD(struct fuse_removemapping_in, count, 0, 4);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 31
SIZE(struct fuse_removemapping_one, 16);
FIELD(struct fuse_removemapping_one, moffset, 0, 8);
FIELD(struct fuse_removemapping_one, len, 8, 8);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 34
SIZE(struct fuse_syncfs_in, 8);
FIELD(struct fuse_syncfs_in, padding, 0, 8);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 39
SIZE(struct fuse_sx_time, 16);
FIELD(struct fuse_sx_time, tv_sec, 0, 8);
FIELD(struct fuse_sx_time, tv_nsec, 8, 4);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 39
SIZE(struct fuse_statx, 256);
FIELD(struct fuse_statx, mask, 0, 4);
FIELD(struct fuse_statx, blksize, 4, 4);
FIELD(struct fuse_statx, attributes, 8, 8);
FIELD(struct fuse_statx, nlink, 16, 4);
FIELD(struct fuse_statx, uid, 20, 4);
FIELD(struct fuse_statx, gid, 24, 4);
FIELD(struct fuse_statx, mode, 28, 2);
FIELD(struct fuse_statx, ino, 32, 8);
FIELD(struct fuse_statx, size, 40, 8);
FIELD(struct fuse_statx, blocks, 48, 8);
FIELD(struct fuse_statx, attributes_mask, 56, 8);
FIELD(struct fuse_statx, atime, 64, 16);
FIELD(struct fuse_statx, btime, 80, 16);
FIELD(struct fuse_statx, ctime, 96, 16);
FIELD(struct fuse_statx, mtime, 112, 16);
FIELD(struct fuse_statx, rdev_major, 128, 4);
FIELD(struct fuse_statx, rdev_minor, 132, 4);
FIELD(struct fuse_statx, dev_major, 136, 4);
FIELD(struct fuse_statx, dev_minor, 140, 4);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 39
SIZE(struct fuse_statx_in, 24);
FIELD(struct fuse_statx_in, getattr_flags, 0, 4);
FIELD(struct fuse_statx_in, fh, 8, 8);
FIELD(struct fuse_statx_in, sx_flags, 16, 4);
FIELD(struct fuse_statx_in, sx_mask, 20, 4);
#endif

#if FUSE_KERNEL_MINOR_VERSION >= 39
SIZE(struct fuse_statx_out, 288);
FIELD(struct fuse_statx_out, attr_valid, 0, 8);
FIELD(struct fuse_statx_out, attr_valid_nsec, 8, 4);
FIELD(struct fuse_statx_out, flags, 12, 4);
FIELD(struct fuse_statx_out, stat, 32, 256);
#endif

SIZE(struct fuse_dirent, 24);
FIELD(struct fuse_dirent, ino, 0, 8);
FIELD(struct fuse_dirent, off, 8, 8);
FIELD(struct fuse_dirent, namelen, 16, 4);
FIELD(struct fuse_dirent, type, 20, 4);

SIZE(struct fuse_direntplus, 152);
FIELD(struct fuse_direntplus, entry_out, 0, 128);
FIELD(struct fuse_direntplus, dirent, 128, 24);

SIZE(struct fuse_notify_retrieve_in, 40);
FIELD(struct fuse_notify_retrieve_in, offset, 8, 8);
FIELD(struct fuse_notify_retrieve_in, size, 16, 4);

#if FUSE_KERNEL_MINOR_VERSION >= 40
SIZE(struct fuse_backing_map, 16);
FIELD(struct fuse_backing_map, fd, 0, 4);
FIELD(struct fuse_backing_map, flags, 4, 4);
#endif
