// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Preloaded into a QEMU that is primary under TCG, 7.2 to 11.
//
// Its colo_do_checkpoint_transaction() calls qemu_savevm_live_state() without
// the big lock. There TCG's log_global_after_sync has a vCPU do some work and waits
// for it, which under KVM is not so (do_run_on_cpu). Two things go wrong:
//
// The wait, qemu_cond_wait(&qemu_work_cond, &big lock), is on a mutex that the thread
// does not own. It unlocks another's mutex, returns owning it, and deadlocks with
// itself when it starts the guest again. So here a wait on a mutex that the caller does
// not own is a short sleep. Callers look at their condition again. (With a deadline it
// could last for ever: on which clock depends on QEMU's version.)
//
// The vCPU is woken without the lock under which it looks for work before it sleeps,
// so it may sleep through that, and the primary waits for ever. So all that sleep on
// this mutex are woken once more; they, too, look at their condition again.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static int (*real_wait)(pthread_cond_t *, pthread_mutex_t *);
static __thread int tid;

// Who sleeps. An entry is written by a thread that holds its mutex, and read for a
// mutex that is held.
static struct sleeper {
	pthread_mutex_t *mutex;
	pthread_cond_t *cond;
} sleepers[256];

static struct sleeper *sleeps(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
	for (int i = 0; i < 256; i++) {
		struct sleeper *s = &sleepers[i];

		if (!__sync_bool_compare_and_swap(&s->mutex, NULL, mutex))
			continue;
		s->cond = cond;
		return s;
	}
	return NULL;
}

static void wake(pthread_mutex_t *mutex)
{
	for (int i = 0; i < 256; i++)
		if (sleepers[i].mutex == mutex)
			pthread_cond_broadcast(sleepers[i].cond);
}

__attribute__((constructor)) static void find(void)
{
	// The version matters: glibc has an older function of the same name.
	real_wait = dlvsym(RTLD_NEXT, "pthread_cond_wait", "GLIBC_2.3.2");
}

int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
	if (!real_wait)
		find();
	if (!tid)
		tid = syscall(SYS_gettid);
	if (mutex->__data.__owner == tid) {
		struct sleeper *s = sleeps(cond, mutex);
		int err = real_wait(cond, mutex);

		if (s)
			s->mutex = NULL;
		return err;
	}
	pthread_mutex_lock(mutex);
	wake(mutex);
	pthread_mutex_unlock(mutex);
	usleep(50);
	return 0;
}
