// SPDX-License-Identifier: Apache-2.0

package control

import (
	"time"

	"github.com/lockstep-ft/lockstep/control/journal"
	"github.com/lockstep-ft/lockstep/control/qmp"
)

// reaction is what the daemon does on an event of QEMU's.
type reaction uint8

const (
	act    reaction = iota + 1 // watchMonitor or guestEvent has a case for it
	report                     // a line of log, and of `lockstep events`
	quiet                      // a line of the debug log
)

// qmpEvent is a reaction and its reason.
type qmpEvent struct {
	reaction reaction
	why      string
}

// qmpEvents are all events of QEMU 7.2 to 11.1. One that is not here is a newer
// QEMU's: it is reported, since nobody has found yet that it may be passed over.
var qmpEvents = map[string]qmpEvent{
	// The guest runs, or does not.
	"STOP":                {act, "a checkpoint's, or one that nobody asked for: what is held stays held (R15)"},
	"RESUME":              {act, "ends a checkpoint (R14)"},
	"COLO_EXIT":           {act, "QEMU lost the other host's QEMU"},
	"SHUTDOWN":            {act, "the guest powered off: the pair stays off (R25); somebody ends QEMU: it counts as dead at once"},
	"RESET":               {act, "the guest boots again: a checkpoint has both begin at one point (R25)"},
	"POWERDOWN":           {report, "the guest was asked to power off; SHUTDOWN follows when it obeys"},
	"GUEST_PANICKED":      {act, "a guest that QEMU has stopped for it counts as dead (R25)"},
	"GUEST_CRASHLOADED":   {report, "the guest panicked and boots a crash kernel"},
	"GUEST_PVSHUTDOWN":    {report, "the guest says that it powers off; SHUTDOWN follows"},
	"WATCHDOG":            {act, "the same, where the watchdog's action is pause; RESET or SHUTDOWN follows another"},
	"SUSPEND":             {report, "the guest sleeps until something wakes it; it is left alone"},
	"SUSPEND_DISK":        {report, "SHUTDOWN follows"},
	"WAKEUP":              {report, "ends SUSPEND"},
	"MEMORY_FAILURE":      {report, "the host's memory is bad; if the guest or QEMU dies of it, that is seen by itself"},
	"MIGRATION":           {quiet, "whoever migrates polls query-migrate"},
	"MIGRATION_PASS":      {quiet, "the same"},
	"VFIO_MIGRATION":      {quiet, "a VFIO device's part in a migration; COLO has none"},
	"DUMP_COMPLETED":      {report, "the guest stood still while somebody dumped its memory"},
	"RTC_CHANGE":          {quiet, "the guest set its clock; the other guest sets its own"},
	"JOB_STATUS_CHANGE":   {quiet, "whoever runs a job polls it"},
	"BLOCK_JOB_CANCELLED": {quiet, "the same"},
	"BLOCK_JOB_COMPLETED": {act, "with an error: the copy of a disk failed (R24)"},
	"BLOCK_JOB_PENDING":   {quiet, "the same"},
	"BLOCK_JOB_READY":     {quiet, "the same"},

	// Disks.
	"BLOCK_IO_ERROR":            {act, "QEMU has stopped the guest because of a disk (R24)"},
	"BLOCK_JOB_ERROR":           {act, "the copy of a disk met an error (R24)"},
	"BLOCK_IMAGE_CORRUPTED":     {report, "an image is damaged; QEMU fails what touches it"},
	"BLOCK_WRITE_THRESHOLD":     {report, "an image has grown to the size that somebody asked to be told of"},
	"BLOCK_EXPORT_DELETED":      {quiet, "an NBD export ended, which who ended it knows"},
	"QUORUM_FAILURE":            {report, "no copy of a disk took a write or gave a read"},
	"QUORUM_REPORT_BAD":         {act, "one copy of a disk failed, and names itself (R24)"},
	"PR_MANAGER_STATUS_CHANGED": {report, "the helper for SCSI persistent reservations came or went"},

	// Devices that come and go: the other guest's does not, so the next checkpoint fails.
	"DEVICE_DELETED":            {report, "a device was unplugged on this host only"},
	"DEVICE_UNPLUG_GUEST_ERROR": {report, "the guest did not let a device go"},
	"MEM_UNPLUG_ERROR":          {report, "the same, for memory"},
	"MEMORY_DEVICE_SIZE_CHANGE": {report, "the guest's memory changed its size on this host only"},
	"UNPLUG_PRIMARY":            {report, "a failover NIC gave its hardware up before a migration; COLO has none"},
	"FAILOVER_NEGOTIATED":       {report, "the guest uses a failover NIC, whose hardware lockstep does not see"},
	"ACPI_DEVICE_OST":           {quiet, "the guest's word on a device that was plugged or unplugged"},
	"BALLOON_CHANGE":            {quiet, "memory given back is zero on both hosts at the next checkpoint"},
	"HV_BALLOON_STATUS_REPORT":  {quiet, "the same"},
	"DEVICE_TRAY_MOVED":         {report, "a medium was changed on this host only"},
	"CPU_POLARIZATION_CHANGE":   {quiet, "s390: where the guest would like its CPUs to run"},
	"SCLP_CPI_INFO_AVAILABLE":   {quiet, "s390: the guest told its name and its system's"},
	"NIC_RX_FILTER_CHANGED":     {quiet, "the guest's MAC filter; lockstep mirrors whatever reaches the tap"},
	"VSERPORT_CHANGE":           {quiet, "a virtio serial port was opened or closed"},
	"VFU_CLIENT_HANGUP":         {report, "a device that another process serves lost it"},
	"RDMA_GID_STATUS_CHANGED":   {report, "an RDMA NIC, which passes by the tap, changed its addresses"},

	// Backends of devices that pass by the tap: `lockstep doctor` and the start of the pair refuse them.
	"NETDEV_STREAM_CONNECTED":        {report, "a socket NIC, which passes by the tap, found its other end"},
	"NETDEV_STREAM_DISCONNECTED":     {report, "the same NIC lost it"},
	"NETDEV_VHOST_USER_CONNECTED":    {report, "a vhost-user NIC, which passes by the tap, found its switch"},
	"NETDEV_VHOST_USER_DISCONNECTED": {report, "the same NIC lost it"},

	// Consoles.
	"SPICE_CONNECTED":         {quiet, "somebody looks at the guest's screen"},
	"SPICE_DISCONNECTED":      {quiet, "the same"},
	"SPICE_INITIALIZED":       {quiet, "the same"},
	"SPICE_MIGRATE_COMPLETED": {quiet, "the same"},
	"VNC_CONNECTED":           {quiet, "the same"},
	"VNC_DISCONNECTED":        {quiet, "the same"},
	"VNC_INITIALIZED":         {quiet, "the same"},
}

// onEvent is the reaction to an event.
func onEvent(name string) reaction {
	if e, known := qmpEvents[name]; known {
		return e.reaction
	}
	return report
}

// reportEvent makes an event known, whatever the daemon does about it. A disk that
// fails may send the same one thousands of times: once a second is enough.
func (mo *monitor) reportEvent(e qmp.Event) {
	if onEvent(e.Event) == quiet {
		mo.d.log.Debug("QEMU", "event", e.Event, "data", e.Data)
		return
	}
	mo.d.post(func() {
		if time.Since(mo.reported[e.Event]) < time.Second {
			return
		}
		if mo.reported == nil {
			mo.reported = make(map[string]time.Time)
		}
		mo.reported[e.Event] = time.Now()
		mo.d.log.Info("QEMU", "event", e.Event, "data", e.Data)
		mo.d.event(journal.QEMU, e.Event, e.Data)
	})
}
